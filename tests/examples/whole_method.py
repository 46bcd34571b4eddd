"""Train a text-to-image diffusion model on MNIST and sample from it: `python whole_method.py [STEPS]`."""

import sys

import torch

import cond_diffusion as cd
from cond_diffusion.config.data import DataConfig
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.images import grid, to_model, to_pillow

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
data = load_captioned_images(DataConfig(source="mnist"))
encoder = cd.TextEncoder.from_pretrained("builtin", max_length=16)
contexts = torch.stack([encoder([captions[0]])[0] for captions in data.caption_groups])  # one per digit
null_context = encoder([""])[0]
schedule = cd.NoiseSchedule(cd.ScheduleConfig(beta_schedule="cosine"))
objective = cd.Objective(cd.ObjectiveConfig(prediction="v_prediction"), schedule)
unet = cd.UNet(cd.UNetConfig(channels=(32, 64), num_groups=4, in_channels=1, sample_size=28, context_dim=64))
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)

for step in range(steps):
    rows = torch.randint(len(data), (64,))
    x_0, context = to_model(data.images[rows]), contexts[data.group_of[rows]]
    context = cd.drop_captions(context, null_context, torch.rand(64) < 0.1)
    t, eps = torch.randint(schedule.num_timesteps, (64,)), torch.randn_like(x_0)
    loss = objective.loss(unet, x_0, t, eps, context)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}", flush=True)

with torch.inference_mode():
    context = encoder([f"a digit {word}" for word in ("zero", "one", "two", "three")]).repeat_interleave(4, dim=0)
    network = cd.guided(unet, context, null_context.expand_as(context), torch.full((16,), 2.0))
    denoise = cd.denoiser(network, objective.prediction, lambda x_0_hat: x_0_hat.clamp(-1, 1))
    x, timesteps = torch.randn(16, 1, 28, 28), schedule.sampling_timesteps(100)
    for sample in cd.ddpm(denoise, schedule, x, timesteps, lambda: torch.randn(16, 1, 28, 28), variance="posterior"):
        x = sample.x
grid(to_pillow(x), columns=4).save("digits.png")
