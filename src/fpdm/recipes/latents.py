"""The paper's data sets at 256 x 256 pixels, in the latents of an autoencoder (32 x 32 x 4, 256 tokens).

The settings are the paper's where it has any: FPDM-XL/2, epsilon, AdamW with 1e-4 and no weight decay, batch 512, EMA
0.9999, N = 10 and M = 12 (Bai and Melas-Kyriazi 2024). Nothing here was trained: no GPU was to be had. Before a run,
`fpdm train RECIPE --dry-run` prints what it takes and tries all of it in miniature.
"""

from fpdm.training.config import Config


def _latents(classes: int, steps: int) -> Config:
    return Config().with_fields(
        source="latents",
        image_size=32,
        channels=4,
        classes=classes,
        model="XL/2",
        flip=True,
        holdout=1000,
        steps=steps,
        batch_size=512,
        lr=1e-4,
        mixed_precision="bf16",
        workers=4,
        log_every=100,
        sample_every=10_000,
        sample_budget=560,
        validate_every=5000,
        checkpoint_every=5000,
    )


def imagenet256() -> Config:
    """ImageNet: 1,281,167 pictures, 1000 classes.

    fpdm latents DIR/train --vae stabilityai/sd-vae-ft-ema --flip --out imagenet-latents
    fpdm train imagenet256 --data imagenet-latents     several GPUs; not measured
    """
    return _latents(classes=1000, steps=400_000)


def ffhq256() -> Config:
    """FFHQ: 70,000 faces, no classes.

    fpdm latents DIR --vae stabilityai/sd-vae-ft-ema --flip --out ffhq-latents
    fpdm train ffhq256 --data ffhq-latents     several GPUs; not measured
    """
    return _latents(classes=0, steps=400_000)


def celebahq256() -> Config:
    """CelebA-HQ: 30,000 faces, no classes.

    fpdm latents DIR --vae stabilityai/sd-vae-ft-ema --flip --out celebahq-latents
    fpdm train celebahq256 --data celebahq-latents     several GPUs; not measured
    """
    return _latents(classes=0, steps=400_000)


def lsun_church256() -> Config:
    """LSUN-Church: 126,227 outdoor pictures of churches, no classes.

    fpdm latents DIR --vae stabilityai/sd-vae-ft-ema --flip --out church-latents
    fpdm train lsun_church256 --data church-latents     several GPUs; not measured
    """
    return _latents(classes=0, steps=400_000)
