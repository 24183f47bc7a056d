"""GR-Gauge in other people's training loops and searches: one file a framework, which imports that framework alone.

transformers · lightning · optuna · ray · timm
"""
