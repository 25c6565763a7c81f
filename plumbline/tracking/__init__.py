"""A run's curves for TensorBoard, W&B and MLflow."""
