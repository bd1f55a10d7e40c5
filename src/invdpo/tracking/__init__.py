"""The study's runs in MLflow: a view of the files, made again from them at any time, and a live one of training."""
