"""From per-image scores to tables, figures and verdicts. Reads files only; never a model, never MLflow."""
