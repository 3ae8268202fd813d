from fpdm.recipes.forms import form
from fpdm.training.config import Config


def cifar10() -> Config:
    """CIFAR-10 as an image folder: 50,000 pictures, 32 x 32, 10 classes, in pixels (256 tokens).

    fpdm train cifar10 --data DIR/train     one GPU; not measured yet
    """
    return Config().with_fields(
        source="auto",
        image_size=32,
        model="S/2",
        **form("1+1+1"),
        flip=True,
        steps=200_000,
        batch_size=128,
        lr=2e-4,
        warmup=1000,
        mixed_precision="bf16",
        prediction_type="v_prediction",
        beta_schedule="cosine",
        workers=4,
        log_every=100,
        sample_every=5000,
        checkpoint_every=5000,
    )
