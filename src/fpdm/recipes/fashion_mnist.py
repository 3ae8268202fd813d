from fpdm.recipes.forms import form
from fpdm.training.config import Config


def fashion_mnist() -> Config:
    """Fashion-MNIST: 60,000 grey pictures of clothes, 28 x 28, 10 classes (MIT licence; bring the four IDX files).

    fpdm train fashion_mnist --data DIR     two cores, no GPU: about an hour (195 images/s)
    """
    return Config().with_fields(
        source="auto",
        image_size=28,
        channels=1,
        hidden_size=128,
        num_heads=4,
        patch_size=4,
        prediction_type="v_prediction",
        beta_schedule="cosine",
        **form("0+4+0"),
        steps=10_000,
        batch_size=64,
        lr=1e-3,
        lr_schedule="cosine",
        warmup=200,
        beta2=0.99,
        ema=0.999,
        log_every=100,
        sample_every=2000,
        checkpoint_every=1000,
    )
