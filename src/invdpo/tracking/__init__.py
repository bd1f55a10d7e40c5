"""The study's runs in MLflow: a view of the files, made again from them at any time."""

from invdpo.tracking.mlflow_sync import SyncReport, sync

__all__ = ["SyncReport", "sync"]
