from fpdm.recipes.forms import form
from fpdm.training.config import Config


def images() -> Config:
    """Any folder of images, one folder per class or none.

    fpdm train images --data DIR --image-size 64 --model S/4

    Hours and scores depend on the folder. The defaults are those of the paper where it has any (AdamW, 1e-4, no weight
    decay, EMA 0.9999), but for N and M, with a batch that one device takes and a short warm-up.
    """
    return Config().with_fields(
        source="auto",
        image_size=64,
        model="S/4",
        **form("1+1+1"),
        flip=True,
        prediction_type="v_prediction",
        beta_schedule="cosine",
        steps=200_000,
        batch_size=64,
        lr=1e-4,
        warmup=500,
        workers=2,
        log_every=50,
        sample_every=1000,
        checkpoint_every=1000,
    )
