"""Neural networks: UNet, text encoder, latent spaces, LoRA, and averages of the weights."""
