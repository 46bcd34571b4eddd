"""Train the shipped MNIST classifier anew: `python tests/mnist_classifier.py FILE`.

The figures that were measured with the shipped weights do not compare with those of new ones.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_model

from cond_diffusion.config.run import Config, load_config
from cond_diffusion.data.dataset import load_captioned_images
from cond_diffusion.evaluation import metrics
from cond_diffusion.pipeline.checkpoint import BUILT_IN_MODEL


def main() -> None:
    config = load_config(Config, BUILT_IN_MODEL / "config.yaml").data
    train, test = (load_captioned_images(config, split) for split in ("train", "test"))
    classifier = metrics.train_classifier(train).half()
    save_model(classifier, sys.argv[1], {metrics.TRAINED_ON: metrics.fingerprint(train)})
    size = Path(sys.argv[1]).stat().st_size
    share = classifier.float().accuracy(metrics.renumber_groups(test, train.caption_groups))
    print(f"{metrics.digest(classifier)}: {share:.2%} of the test images, {size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
