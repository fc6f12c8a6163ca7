"""Train a convolutional network of timm's on small images, as a --teacher of `convmixer train`.

    python docs/train_teacher.py DATA OUTPUT --epochs 30

The network, not one of this package, sees the images enlarged, so that its first layers, made for
224 pixels, leave enough of them. Held-out images are those of `convmixer train --held-out 1000`
with the same seed, so that a model can be taught and measured without either having seen them.
"""

import argparse
import math
import time
from pathlib import Path

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2

import convmixer_hub  # noqa: F401  (registers the models)
from convmixer_hub.data.reader import open_dataset
from convmixer_hub.evaluate import collect_logits, count_correct
from convmixer_hub.machine import count_workers, find_device
from convmixer_hub.training.images import choose_images, load_images, serve_batches
from convmixer_hub.training.muon import fast_muon
from convmixer_hub.training.network import Network
from convmixer_hub.training.settings import OPTIMIZERS, TrainingSettings
from convmixer_hub.training.step import TrainingStep
from convmixer_hub.training.teacher import ForOtherImages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("output")
    parser.add_argument("--model", default="resnet18", help="a model of timm's")
    parser.add_argument("--image-size", type=int, default=128, help="what images are enlarged to")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--rand-augment", default="rand-m9-n1-mstd0.5-inc1")
    parser.add_argument("--held-out", type=int, default=1000)
    parser.add_argument("--train-images", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    settings = TrainingSettings(
        options.model,
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.lr,
        final_share=1.0,
        whole_share=1.0,
        label_smoothing=0.0,  # a teacher's small probabilities are what is learned from it
        rand_augment=options.rand_augment,
        random_erasing=0.25,
        held_out=options.held_out,
        train_images=options.train_images,
        seed=options.seed,
    )

    # The images, prepared as for the model that will be taught.
    torch.manual_seed(options.seed)
    dataset, device = open_dataset(options.data), find_device()
    config = resolve_input_data_config(timm.create_model("convmixer_cifar", device="meta"))
    training, held_out = load_images(
        settings, choose_images(settings, dataset), config, skip_damaged=False
    )
    workers = count_workers() if device.type == "cuda" else 0
    batches = serve_batches(settings, training, 0, 0, workers)

    # The network.
    overlay = {
        "input_size": (3, options.image_size, options.image_size),
        "mean": config["mean"],
        "std": config["std"],
        "label_names": dataset.classes,
    }
    model = timm.create_model(
        options.model, num_classes=len(dataset.classes), pretrained_cfg_overlay=overlay
    )
    own = resolve_input_data_config(model)
    network = ForOtherImages(model, own, config).to(device)
    optimizer = create_optimizer_v2(
        network,
        opt="muon",
        lr=options.lr,
        weight_decay=settings.weight_decay,
        capturable=device.type == "cuda",
        **OPTIMIZERS["muon"],
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    take_step = TrainingStep(Network(network, network, None, optimizer), settings, dtype, device)

    # The training.
    Path(options.output).mkdir(parents=True, exist_ok=True)
    steps = len(training) // settings.batch_size
    for epoch in range(settings.epochs):
        start = time.monotonic()
        network.train()
        numbers = torch.zeros(3, dtype=torch.float64, device=device)
        for step in range(steps):
            images, labels = (x.to(device, non_blocking=True) for x in next(batches))
            factor = settings.learning_rate_factor(epoch + (step + 0.5) / steps)
            with fast_muon(dtype, device):
                numbers += take_step(images, labels, labels, factor)
        loss, correct, _ = (numbers / (steps * settings.batch_size)).tolist()
        if not math.isfinite(loss):
            parser.error(f"the loss is {loss} in epoch {epoch + 1}; give a smaller --lr")
        line = f"epoch {epoch + 1}  train_loss {loss:.4f}  train_top1 {100 * correct:.2f}"
        if held_out is not None:
            result = count_correct(*collect_logits(network, held_out))
            line += f"  held_out_top1 {result.top1:.2f}"
        print(f"{line}  seconds {time.monotonic() - start:.1f}", flush=True)
    model.to(memory_format=torch.contiguous_format)
    save_for_hf(model, options.output, safe_serialization=True)


if __name__ == "__main__":
    main()
