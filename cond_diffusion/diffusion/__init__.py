"""The diffusion process: noise schedule, training objective, samplers, guidance."""
