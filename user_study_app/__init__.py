"""A blind study of human preferences between two methods' images: bundle, server, storage and analysis."""
