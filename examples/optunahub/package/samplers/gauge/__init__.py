from grgauge.integrations.optuna import GaugeSampler, report

__all__ = ["GaugeSampler", "report"]
