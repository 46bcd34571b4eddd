"""The mathematics: schedule, prediction, loss, samplers, guidance."""
