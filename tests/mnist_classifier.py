"""Train the shipped MNIST classifier anew: `python tests/mnist_classifier.py FILE`.

The figures that were measured with the shipped weights do not compare with those of new ones.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.evaluation.metrics import TRAINED_ON, accuracy, fingerprint, renumber_groups, train_classifier
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL


def main() -> None:
    config = load_config(Config, BUILT_IN_MODEL / "config.yaml").data
    train, test = (load_captioned_images(config, split) for split in ("train", "test"))
    classifier = train_classifier(train)
    half = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in classifier.state_dict().items()
    }
    save_file(half, sys.argv[1], metadata={TRAINED_ON: fingerprint(train)})
    classifier.load_state_dict({name: tensor.float() for name, tensor in half.items()})
    size = Path(sys.argv[1]).stat().st_size
    share = accuracy(classifier, renumber_groups(test, train.caption_groups))
    print(f"{classifier.digest()}: {share:.2%} of the test images, {size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
