from grgauge.integrations.optuna import GaugePruner, report

__all__ = ["GaugePruner", "report"]
