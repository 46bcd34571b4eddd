"""Write the emoji model for `assets/`, in half precision: `python tests/emoji_model.py CHECKPOINT FOLDER`."""

import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from cond_diffusion.config.run import CONFIG_NAME, save_config
from cond_diffusion.pipeline.checkpoint import open_checkpoint
from cond_diffusion.pipeline.text_to_image import TextToImage


def main() -> None:
    checkpoint, folder = open_checkpoint(sys.argv[1]), Path(sys.argv[2])
    TextToImage.from_checkpoint(checkpoint).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        half = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(half, file, {"format": "pt"})
        print(file, file.stat().st_size)
    config = checkpoint.run_config
    # Runs that start from the model (`init_from`) take their text encoder from it.
    save_config(replace(config, text=replace(config.text, encoder="emoji")), folder / CONFIG_NAME)


if __name__ == "__main__":
    main()
