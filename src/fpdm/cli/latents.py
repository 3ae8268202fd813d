"""Encode images with an autoencoder once, so that training reads latents.

  fpdm latents DIR --vae stabilityai/sd-vae-ft-ema --image-size 256 --flip --out latents
  fpdm train ffhq256 --data latents
  accelerate launch -m fpdm latents DIR --vae VAE --out latents       on several devices

SOURCE is whatever `fpdm train` reads: a folder of images or of tar files, an .npz file, hub:NAME, and so on. After an
interruption the same command goes on. Kept are mean and standard deviation, from which training draws.
"""

import argparse
from pathlib import Path

from fpdm.cli.processes import leave
from fpdm.cli.quiet import quiet_libraries
from fpdm.files import check_writable, hold, is_free, is_inside


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="the images")
    parser.add_argument("--vae", required=True, metavar="VAE", help="folder or hub name of an AutoencoderKL")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="where the latents go")
    parser.add_argument("--image-size", type=int, default=256, metavar="PIXELS", help="side of the images (256)")
    parser.add_argument("--split", default="train", help="of IDX files, or of a data set of Hugging Face's (train)")
    parser.add_argument("--flip", action="store_true", help="encode mirrored images, too, for training with --flip")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    parser.add_argument("--dtype", default="float32", metavar="{float32,bfloat16,float16}", help="of the autoencoder")


def run(options: argparse.Namespace) -> int:
    out = Path(options.out)
    if min(options.batch_size, options.image_size) < 1:
        raise ValueError("--batch-size and --image-size must be at least 1")
    check_writable(out)
    quiet_libraries()
    from tqdm import tqdm

    from fpdm.data import ImageFolder, open_images
    from fpdm.data.encoding import SHARD, Encoder, open_autoencoder
    from fpdm.devices import join_processes
    from fpdm.drawing import dtype_of

    dtype, processes = dtype_of(options.dtype), join_processes(options.device)
    vae, autoencoder = open_autoencoder(options.vae)
    source = open_images(options.source, split=options.split, size=options.image_size)
    if isinstance(source, ImageFolder) and is_inside(out, Path(options.source)) and is_free(out):
        raise ValueError(f"{out} is in the folder of the images: choose another --out")
    vae.to(processes.device, dtype)
    encoder = Encoder(
        source,
        vae,
        autoencoder,
        out,
        options.image_size,
        options.flip,
        options.batch_size,
        process=(processes.index, processes.count),
    )
    locks = []

    def begin() -> None:
        out.mkdir(parents=True, exist_ok=True)
        locks.append(hold(out))  # until this process ends
        encoder.claim()

    processes.first(begin)
    # Each looks for damage in its own shards, which are many gigabytes; what is missing is shared out evenly.
    missing = sorted(processes.together(encoder.missing()))
    share = min(len(source), len(missing) * SHARD) // processes.count
    with tqdm(total=share, unit="image", disable=not processes.main) as bar:
        encoder.on_image = bar.update
        encoder.run(missing[processes.index :: processes.count])
    processes.wait()
    if processes.main:
        broken = encoder.finish()
        for name in broken[:10]:
            print(f"left out: {name}")
        print(
            f"{len(source) - len(broken):,} latents in {out}" + (f", {len(broken)} images left out" if broken else "")
        )
    if processes.count > 1:
        leave(0)
    return 0
