"""Looks at a run: at images that are never trained on, the same at every look."""

import pytest
import torch

from fpdm.data import Slots, Stream, digits
from fpdm.models import FixedPointDiT
from fpdm.training.build import build
from fpdm.training.loop import Trainer
from fpdm.training.validation import BUCKETS, PROBED, Subset, Validation, split
from tests.networks import randomised
from tests.training.runs import interrupt_at, log_of, tensors_of, tiny

CPU = torch.device("cpu")


class Numbers:
    """Images that are their numbers, in chunks."""

    def __init__(self, *chunks):
        self.chunks, self.class_names, self.channels, self.fingerprint = chunks, [], 1, "numbers"
        self.labels = list(range(100, 100 + sum(chunks)))

    def __len__(self):
        return sum(self.chunks)

    def load(self, index):
        return index, self.labels[index]


@pytest.mark.parametrize("chunks", [(20,), (3, 1, 9, 7), (1,) * 20, (19, 1)])
@pytest.mark.parametrize("holdout", [1, 7, 10])
def test_held_out_images_are_never_trained_on_and_no_other_is_lost(chunks, holdout):
    train, held = split(Numbers(*chunks), holdout, seed=3)
    assert len(held) == holdout
    kept = {held.load(i)[0] for i in range(holdout)}
    stream = Stream(train, lambda image, chance: torch.tensor([image]), batch_size=5, seed=3)
    steps = 4 * -(-len(train) // 5)  # of four epochs
    seen = [int(stream[key].image) for keys in Slots(0, steps, 5) for key in keys]
    assert set(seen) | kept == set(range(20))
    assert not set(seen) & kept
    assert len(set(seen[: len(train)])) == len(train)  # each once in an epoch


@pytest.mark.parametrize("chunks", [(20,), (3, 1, 9, 7), (1,) * 20])
def test_a_subset_has_the_chunks_and_labels_of_its_images(chunks):
    source = Numbers(*chunks)
    for part in split(source, 6, seed=1):
        assert sum(part.chunks) == len(part) == len(part.labels)
        assert all(part.load(i) == (n, 100 + n) for i, n in enumerate(part.numbers))
        assert part.labels == [part.load(i)[1] for i in range(len(part))]
        chunk_of = [c for c, size in enumerate(chunks) for _ in range(size)]
        counts = [sum(chunk_of[n] == c for n in part.numbers) for c in range(len(chunks))]
        assert list(part.chunks) == [count for count in counts if count]


def test_a_subset_of_all_is_all():
    source = Numbers(3, 4)
    assert Subset(source, list(range(7))).chunks == source.chunks


def test_the_seed_says_which_are_held_out():
    one, again, other = (split(Numbers(20), 7, seed)[1].numbers for seed in (0, 0, 1))
    assert one == again
    assert one != other
    assert split(Numbers(20), 0, 0)[1] is None


def test_more_than_half_is_not_held_out(tmp_path):
    assert split(Numbers(20), 10, 0)[1] is not None
    with pytest.raises(ValueError, match=r"holdout is 11.*half of the 20 images"):
        split(Numbers(20), 11, 0)
    with pytest.raises(ValueError, match=r"holdout is 899.*1797"):
        Trainer(tiny(holdout=899), tmp_path / "run")


def validation_of(**changes):
    parts = build(tiny(**changes))
    made = Validation(parts.source, parts.held, parts.prepare, parts.loss, 0, parts.typical)
    return parts, made


def test_the_same_weights_give_the_same_numbers_at_every_look_and_of_every_batch_size():
    parts, one = validation_of(holdout=30)
    _, other = validation_of(holdout=30, steps=99, lr=0.5)
    model = randomised(parts.model)
    look = one.look(model, 8, CPU)
    assert one.look(model, 8, CPU) == look == other.look(model, 8, CPU)
    whole = one.look(model, 64, CPU)
    assert whole.loss == pytest.approx(look.loss, rel=1e-5)
    assert whole.buckets == pytest.approx(look.buckets, rel=1e-4)


@pytest.mark.parametrize("timesteps", [1000, 64, 10])
@pytest.mark.parametrize("holdout", [10, 33, 100])
def test_buckets_are_all_timesteps_in_equal_parts(timesteps, holdout):
    parts, made = validation_of(holdout=holdout, num_train_timesteps=timesteps)
    counts = (made.timesteps * BUCKETS // timesteps).bincount(minlength=BUCKETS)
    assert counts.min() >= holdout // BUCKETS - 1
    assert (made.timesteps.min(), made.timesteps.max()) <= (timesteps // 10, timesteps - 1)
    assert made.timesteps.max() >= timesteps * 9 // 10
    look = made.look(randomised(parts.model), 32, CPU)
    assert len(look.buckets) == BUCKETS


def test_fewer_images_than_buckets_leave_some_without_a_number():
    parts, made = validation_of(holdout=4)
    assert len(made.look(randomised(parts.model), 32, CPU).buckets) == BUCKETS


def test_the_loss_is_that_of_the_held_out_images():
    parts, made = validation_of(holdout=12, num_train_timesteps=1000)
    model = randomised(parts.model)
    total = []
    for i in range(12):
        x0 = parts.prepare(*[parts.held.load(i)[0]], torch.Generator())[None]
        t, noise, y = made.timesteps[i : i + 1], made.noise[i : i + 1], torch.tensor([parts.held.labels[i]])
        with torch.no_grad():
            found = model(parts.loss.noisy(x0, noise, t), t, y, iterations=parts.typical).sample
        total.append(parts.loss(found, x0, noise, t).mse.item())
    look = made.look(model, 5, CPU)
    assert look.loss == pytest.approx(sum(total) / 12, rel=1e-4)
    order = made.timesteps * BUCKETS // 1000
    by_bucket = [torch.tensor(total)[order == b].mean().item() for b in range(BUCKETS)]
    assert look.buckets == pytest.approx(by_bucket, rel=1e-4)


def test_residuals_fall_where_the_core_contracts_and_do_not_where_it_does_not():
    parts, made = validation_of()
    model = randomised(parts.model)
    falls = {}
    for size in (0.05, 1.0):
        with torch.no_grad():
            model.core.inject_z.weight.normal_(0, size, generator=torch.Generator().manual_seed(0))
        look = made.look(model, 8, CPU)
        assert len(look.residuals) == PROBED
        assert (look.loss, look.buckets) == (None, [])  # nothing was held out
        falls[size] = look.residuals[-1] / look.residuals[0]
    assert falls[0.05] < 1e-3
    assert falls[1.0] > 1e-2


def test_an_explicit_network_has_no_residuals():
    parts, made = validation_of(network="dit", depth=2, holdout=10)
    look = made.look(randomised(parts.model), 8, CPU)
    assert (look.residuals, len(look.buckets)) == ([], BUCKETS)


def test_a_run_looks_when_it_should_and_looking_changes_nothing(tmp_path, monkeypatch):
    often, never = ({"holdout": 20, "validate_every": every} for every in (3, 100))
    Trainer(tiny(**often), tmp_path / "often").run()
    Trainer(tiny(**never), tmp_path / "never").run()
    looks = {line["step"]: line["validation"] for line in log_of(tmp_path / "often") if "validation" in line}
    assert list(looks) == [3, 6, 9]
    assert all(len(look["buckets"]) == BUCKETS and len(look["residuals"]) == PROBED for look in looks.values())
    one, other = (tensors_of(tmp_path / name, 10) for name in ("often", "never"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [line for line in log_of(tmp_path / "often") if "validation" not in line] == log_of(tmp_path / "never")

    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        Trainer(tiny(**often), tmp_path / "resumed").run()
    Trainer(tiny(**often), tmp_path / "resumed").run()
    assert log_of(tmp_path / "resumed") == log_of(tmp_path / "often")


def test_what_is_looked_at_is_the_average(tmp_path):
    trainer = Trainer(tiny(holdout=20, validate_every=10), tmp_path / "run")
    trainer.run()
    assert isinstance(trainer.net, FixedPointDiT)
    (look,) = [line["validation"] for line in log_of(tmp_path / "run") if "validation" in line]
    assert trainer._validation.look(trainer.ema.model, 8, CPU).to_dict() == look


def test_another_holdout_is_another_run(tmp_path):
    Trainer(tiny(holdout=20, steps=1), tmp_path / "run").run()
    with pytest.raises(ValueError, match="another run: holdout was 20, is 30"):
        Trainer(tiny(holdout=30), tmp_path / "run")
    assert len(build(tiny(holdout=20)).source) == len(digits()) - 20
