"""DDP and DeepSpeed's ZeRO stages on real ranks: the same numbers, the same checkpoints, one for the other."""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankError, RankPool
from safetensors.torch import load_file
from test_autodo import RECIPE, all_rows, learning
from test_nonfinite import never_had, run_poisoned
from test_train import assert_equal_states, cut_back, lines, run_train, weights

from autodo_dist import build_data, engine_settings
from autodo_dist.build import build
from autodo_dist.commands.evaluate import evaluate_checkpoint
from autodo_dist.config import Config, differences
from autodo_dist.data.loader import Batch, Loader, endless
from autodo_dist.data.manifest import read_manifest
from autodo_dist.errors import AutodoError
from autodo_dist.evaluate import evaluate
from autodo_dist.load_config import check_config
from autodo_dist.nonfinite import recorded
from autodo_dist.parallel import checkpoint, comm, deepspeed_settings
from autodo_dist.progress import resume, tensors
from autodo_dist.steps import hyper_step, renew_validation, shared_step, task_step

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
STAGES = (0, 1, 2, 3)
# Parameters of this size or less are whole on every rank at stage 3; DeepSpeed's 100,000 is more than most here have.
CUT_ALL = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "sub_group_size": 20_000}}
NOTHING = {"learn__augment": "none", "learn__weight": False, "learn__soft_label": False}
SHARED = {"hyper__way": "shared", "hyper__validation_every": 2}


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function as in a new process. DeepSpeed numbers layers and parameters on and on, and compares the numbers
    over ranks at stage 3; those of the pool did not all do the same before.
    """
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
        from deepspeed.runtime.zero.partition_parameters import Init

        Init.param_id = DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    return function(*args)


def small(digits: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """`learning` on pictures of 16 px, as a quarter of the work."""
    tree = learning(digits, folder, **({"data__image_size": 16} | changes))
    return tree | {"engine": tree.get("engine", {})}


def with_stage(tree: dict[str, Any], stage: int | None, file: dict[str, Any] | None = None) -> dict[str, Any]:
    """The same on a ZeRO stage; None: on DDP."""
    engine: dict[str, Any] = {} if stage is None else {"name": "deepspeed", "stage": stage}
    if file is not None:
        root = Path(tree["run"]["root"])
        root.mkdir(parents=True, exist_ok=True)
        engine["deepspeed_config"] = str(root / "deepspeed.json")
        Path(engine["deepspeed_config"]).write_text(json.dumps(file))
    return tree | {"engine": engine}


def first(loader: Loader, steps: int, epoch: int = 0) -> list[Batch]:
    return [replace(batch, next_ids_B=None) for batch in itertools.islice(loader.batches(epoch), steps)]


def go(tree: dict[str, Any], steps: int) -> dict[str, Any]:
    """Steps from the start, a hyper pass of three before them where the tree has any: losses, rows and state."""
    config = check_config(tree, "test")
    torch.set_num_threads(1)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        hyper, losses, norms = parts.hyper, [], []
        validations = endless(parts.loaders.hyper_validation, 0)
        if hyper is not None and hyper.way == "separate":
            parts.model.eval()
            for step, batch in enumerate(first(parts.loaders.hyper, 3), start=1):
                renew_validation(parts, hyper, next(validations), ranks)
                hyper_step(parts, hyper, batch, 0.05, step, ranks)
        parts.model.train()
        for step, batch in enumerate(first(parts.loaders.task, steps)):
            if hyper is None or hyper.way == "separate":
                trained = task_step(parts, batch, step, ranks)
            else:
                if renewed := step % hyper.validation_every == 0:
                    renew_validation(parts, hyper, next(validations), ranks)
                trained = shared_step(parts, hyper, batch, step, 0.05, step + 1, ranks, renewed=renewed)
            losses.append(float(ranks.sum(trained.figures[0])) / config.train.batch_size)
            norms.append(float(parts.engine.norm()))
        rows = all_rows(hyper, ranks) if hyper is not None else torch.zeros(0)
        if hyper is not None and hyper.parameters.shares:
            rows = torch.cat([rows.flatten(), hyper.parameters.shared.value_P])[None]
        parts.engine.share_buffers()
        found = {"losses": torch.tensor(losses), "norms": torch.tensor(norms), "rows": rows}
        state = {name: value.clone() for name, value in checkpoint.leaves(parts.engine.state())}
        parts.engine.close()
        return found | {"state": state}


def assert_same(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert (got["losses"] - expected["losses"]).abs().max() <= tolerance
    if len(expected["rows"]):
        assert (got["rows"] - expected["rows"]).abs().max() <= tolerance
    assert got["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        assert got["state"][name].dtype == value.dtype
        torch.testing.assert_close(got["state"][name], value, rtol=tolerance, atol=tolerance, msg=name)


@needs_deepspeed
@pytest.mark.parametrize(
    "changes",
    [{}, {"optim__clip_norm": 0.5, "train__batch_size": 21}, {"train__precision": "bf16"}],
    ids=["plain", "clipped", "bf16"],
)
def test_twenty_steps_are_ddps_on_every_stage(
    pool: RankPool, digits: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Losses to 1e-6; names, shapes and values of the state too. 21 pictures are 11 and 10 on two ranks."""
    tree = small(digits, tmp_path, **(NOTHING | {"train__batch_size": 20} | changes))
    expected = pool.run(2, fresh, go, tree, 20)[0]
    if "optim__clip_norm" in changes:
        unclipped = pool.run(2, fresh, go, tree | {"optim": tree["optim"] | {"clip_norm": None}}, 20)[0]
        assert (expected["losses"] - unclipped["losses"]).abs().max() > 1e-2
    for stage, file in [*((stage, None) for stage in STAGES), (3, CUT_ALL)]:
        one, two = pool.run(2, fresh, go, with_stage(tree, stage, file), 20)
        assert_same(one, expected, 1e-6)
        assert_same(two, one, 0.0)
        assert one["norms"].isfinite().all()


def first_change(tree: dict[str, Any]) -> float:
    """The 2-norm of the first step of plain SGD, over its learning rate."""
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        before = {name: value.clone() for name, value in parts.engine.state()["model"].items()}
        task_step(parts, first(parts.loaders.task, 1)[0], 0, ranks)
        after = parts.engine.state()["model"]
        change = torch.cat([(after[name] - before[name]).flatten() for name in before])
        parts.engine.close()
        return float(change.norm()) / parts.lr(0)


@needs_deepspeed
@pytest.mark.parametrize("stage", [None, *STAGES])
def test_a_gradient_is_cut_to_its_largest_norm(pool: RankPool, digits: Path, tmp_path: Path, stage: int | None) -> None:
    plain = {"optim__momentum": 0.0, "optim__weight_decay": 0.0, "train__batch_size": 20}
    tree = with_stage(small(digits, tmp_path, **(NOTHING | plain), optim__clip_norm=0.25), stage)
    for found in pool.run(2, fresh, first_change, tree):
        assert found == pytest.approx(0.25, rel=1e-4)


@needs_deepspeed
@pytest.mark.parametrize(
    ("changes", "stages"),
    [
        ({}, STAGES),
        ({"learn__augment": "shared", "hyper__solver": "cg", "hyper__damping": 0.1}, (2, 3)),
        (SHARED, (0, 1, 2)),
        (SHARED | {"hyper__solver": "fisher"}, (2, 3)),  # takes one backward
        (SHARED | {"learn__augment": "none"}, (2, 3)),
        (RECIPE, (1, 2)),
    ],
    ids=str,
)
def test_hypergradients_are_ddps(
    pool: RankPool, digits: Path, tmp_path: Path, changes: dict[str, Any], stages: tuple[int, ...]
) -> None:
    """Rows after six steps of RMSprop, which has every gradient in them, to 1e-6. At stage 3 every weight is cut."""
    tree = small(digits, tmp_path, **({"train__batch_size": 20} | changes))
    expected = pool.run(2, fresh, go, tree, 6)[0]
    assert len(expected["rows"]) == 1 or (expected["rows"].std(0) > 0).all()
    for stage in stages:
        assert_same(pool.run(2, fresh, go, with_stage(tree, stage, CUT_ALL), 6)[0], expected, 1e-6)


@needs_deepspeed
def test_one_rank_and_three(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """On three, a ring adds in another order than on DDP, and parts of parameters are of unequal use."""
    tree = small(digits, tmp_path, train__batch_size=20)
    for ranks, tolerance in ((1, 1e-7), (3, 1e-6)):
        expected = pool.run(ranks, fresh, go, tree, 4)[0]
        for stage in (2, 3):
            assert_same(pool.run(ranks, fresh, go, with_stage(tree, stage, CUT_ALL), 4)[0], expected, tolerance)


@needs_deepspeed
def test_batchnorm(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """DDP hands round rank 0's statistics before each forward, DeepSpeed never: what is shared at last is the same."""
    tree = small(digits, tmp_path, model__name="resnet18", train__batch_size=20, optim__lr=0.01)
    expected = pool.run(2, fresh, go, tree, 3)[0]
    for stage in (1, 3):
        assert_same(pool.run(2, fresh, go, with_stage(tree, stage), 3)[0], expected, 1e-6)


def resumed(tree: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """What a run holds right after it has taken up its newest checkpoint, and its step. Writes nothing."""
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        progress, _ = resume(config, parts, ranks)
        state = tensors(parts)
        flat = {}
        for name, value in checkpoint.leaves(state):
            flat[f".{name}"] = value.full_tensor() if hasattr(value, "full_tensor") else value.clone()
        # What the model computes with, and not only what the optimizer keeps.
        batch = first(parts.loaders.task, 1)[0]
        with torch.no_grad():
            logits = parts.model.eval()(batch.images_BCHW)[1]
        flat["logits"] = ranks.join(logits)
        parts.engine.close()
        return flat, progress.step


@pytest.fixture(scope="module")
def by_ddp(pool: RankPool, digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Settings of a finished run of DDP on two ranks: six task steps, six hyper steps, six task steps."""
    tree = small(digits, tmp_path_factory.mktemp("by_ddp"), hyper__validation_every=3)
    pool.run(2, fresh, run_train, tree)
    return tree


def copied(tree: dict[str, Any], root: Path) -> tuple[dict[str, Any], Path]:
    shutil.copytree(tree["run"]["root"], root)
    return tree | {"run": tree["run"] | {"root": str(root)}}, root / "run"


def taken_up(pool: RankPool, tree: dict[str, Any], ranks: int, step: int) -> torch.Tensor:
    """Check that a resume holds the checkpoint bit for bit, on every rank; the logits that it gives."""
    saved = weights(Path(tree["run"]["root"]) / "run", step)
    parts = pool.run(ranks, fresh, resumed, tree)
    for found, at in parts:
        assert at == step
        logits = found.pop("logits")
        assert found.keys() == saved.keys()
        for name, value in found.items():
            assert torch.equal(value, saved[name]), name
    return logits


@needs_deepspeed
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_changes_its_engine_and_ranks(
    pool: RankPool, digits: Path, by_ddp: dict[str, Any], tmp_path: Path, stage: int
) -> None:
    """The same engine: bit for bit. Another: what was saved bit for bit, and the run goes on as the other would.

    Steps 10 and 15 are inside a hyper pass and inside a task pass.
    """
    tree = with_stage(small(digits, tmp_path / "own", hyper__validation_every=3), stage, CUT_ALL)
    folder = pool.run(2, fresh, run_train, tree)[0]
    final, metrics = weights(folder, 18), lines(folder)
    cut_back(folder, 10)
    pool.run(2, fresh, run_train, tree)
    assert_equal_states(weights(folder, 18), final)
    assert lines(folder) == metrics

    moved, other = copied(by_ddp, tmp_path / "from_ddp")
    expected = weights(other, 18)
    cut_back(other, 15)
    logits = taken_up(pool, moved, 2, 15)
    there = with_stage(moved, stage, CUT_ALL)
    for ranks in (2, 3):
        torch.testing.assert_close(taken_up(pool, there, ranks, 15), logits, rtol=1e-5, atol=1e-5)
    pool.run(3, fresh, run_train, there)
    assert_close(weights(other, 18), expected)
    assert_close(final, expected)

    cut_back(folder, 10)
    back = with_stage(tree, None)
    taken_up(pool, back, 3, 10)
    pool.run(3, fresh, run_train, back)
    assert_close(weights(folder, 18), expected)


def assert_close(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


@needs_deepspeed
def test_three_ranks_resume_bit_for_bit(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """A ring's sums depend on places in a bucket; those must be the same after a resume."""
    tree = with_stage(
        small(digits, tmp_path, train__epochs=1, optim__warmup_epochs=0, hyper__start_epoch=0, **SHARED), 2
    )
    folder = pool.run(3, fresh, run_train, tree)[0]
    final = weights(folder, 6)
    cut_back(folder, 5)
    pool.run(3, fresh, run_train, tree)
    assert_equal_states(weights(folder, 6), final)


@needs_deepspeed
def test_commands_read_what_stage_3_wrote(pool: RankPool, digits: Path, by_ddp: dict[str, Any], tmp_path: Path) -> None:
    tree = with_stage(small(digits, tmp_path, hyper__validation_every=3), 3, CUT_ALL)
    folder = pool.run(2, fresh, run_train, tree)[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert evaluate_checkpoint(folder, None, None)["accuracy"] == summary["test_accuracy_final"]
    theirs = Path(by_ddp["run"]["root"]) / "run"
    diff = subprocess.run(
        ["autodo", "checkpoint", "diff", f"{theirs}@18", f"{folder}@18"], capture_output=True, text=True, check=False
    )
    assert diff.stdout.startswith("equal: "), diff.stdout + diff.stderr
    exports = [tmp_path / f"{name}.safetensors" for name in ("theirs", "ours")]
    for run, out in zip((theirs, folder), exports, strict=True):
        subprocess.run(["autodo", "checkpoint", "export", str(run), str(out)], check=True, capture_output=True)
    assert_equal_states(load_file(exports[1]), load_file(exports[0]))


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_gradient_that_is_not_finite_is_seen(pool: RankPool, digits: Path, tmp_path: Path, stage: int) -> None:
    """ZeRO leaves such a step out and says nothing: the run goes back all the same, and is as if it had never been."""
    bad = {(0, 3): "gradient"}
    tree = small(digits, tmp_path, **NOTHING, train__on_nonfinite="rollback", optim__warmup_epochs=0, train__epochs=1)
    tree = with_stage(tree, stage)
    folder = pool.run(2, fresh, run_poisoned, tree, bad)[0]
    assert [fault.place for fault in recorded(folder)] == [(0, "task", 3)]
    pool.run(2, fresh, never_had, tree, bad, tmp_path / "oracle")
    assert_equal_states(weights(folder, 6), weights(tmp_path / "oracle", 6))


def evaluated(tree: dict[str, Any]) -> dict[str, Any]:
    config = check_config(tree, "test")
    manifest = read_manifest(config.data.root)
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, manifest, ranks)
        found = evaluate(parts.model, parts.loaders.test, manifest.classes, parts.dtype, ranks)
        sizes = [len(batch) for batch in parts.loaders.test.batches(0)]
        parts.engine.close()
        return found | {"last": sizes[-1]}


@needs_deepspeed
def test_a_rank_without_pictures_takes_part_in_evaluation(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    """At stage 3 a forward is a collective."""
    tree = small(digits, tmp_path, **NOTHING, data__image_size=8)
    ((alone,),) = [pool.run(1, fresh, evaluated, tree)]
    tree["train"] |= {"batch_size": alone["pictures"] - 1}
    first_rank, second = pool.run(2, fresh, evaluated, with_stage(tree, 3, CUT_ALL))
    assert (first_rank["last"], second["last"]) == (1, 0)
    assert first_rank["pictures"] == alone["pictures"]
    assert first_rank["accuracy"] == alone["accuracy"]
    assert first_rank["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def let_go(tree: dict[str, Any]) -> list[bool]:
    """Whether model and optimizer are gone after `close`."""
    config = check_config(tree, "test")
    with comm.process_group(comm.place(), torch.device("cpu")) as ranks:
        parts = build(config, read_manifest(config.data.root), ranks)
        task_step(parts, first(parts.loaders.task, 1)[0], 0, ranks)
        parts.engine.close()
        kept = [weakref.ref(parts.model), weakref.ref(parts.engine.optimizer)]
        del parts
        gc.collect()
        return [ref() is None for ref in kept]


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 3])
def test_a_closed_engine_keeps_nothing(pool: RankPool, digits: Path, tmp_path: Path, stage: int) -> None:
    """Or a run that goes back would have two models in memory."""
    tree = with_stage(small(digits, tmp_path, **NOTHING, train__batch_size=20), stage)
    assert pool.run(2, fresh, let_go, tree) == [[True, True]] * 2


# Settings; no DeepSpeed is needed


def settings_of(tmp_path: Path, file: Any, **changes: Any) -> dict[str, Any]:
    path = tmp_path / "ds.json"
    path.write_text(file if isinstance(file, str) else json.dumps(file))
    tree = {"data": {"root": "."}, "engine": {"name": "deepspeed", "stage": 2, "deepspeed_config": str(path)}}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return engine_settings.of_deepspeed(check_config(tree, "test"), ranks=4)


def test_a_file_that_agrees_is_laid_over_ours(tmp_path: Path) -> None:
    agreeing = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1,
        "optimizer": {"type": "sgd", "params": {"lr": 0.1, "momentum": 0.9, "weight_decay": "auto"}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
        "fp16": {"enabled": False, "loss_scale": 0},
        "steps_per_print": 100,
    }
    got = settings_of(tmp_path, agreeing, optim__clip_norm=1.0)
    assert got["gradient_clipping"] == 1.0
    assert got["train_micro_batch_size_per_gpu"] == 64
    assert got["zero_optimization"] == {"memory_efficient_linear": False, "stage": 2, "overlap_comm": True}
    assert got["steps_per_print"] == 100
    assert not {"optimizer", "train_batch_size"} & got.keys()


def test_a_files_optimizer_is_compared_with_the_one_chosen(tmp_path: Path) -> None:
    """The learning rate as it is scaled to the batch of 256; momentum is not AdamW's."""
    chosen = {"optim__name": "adamw", "optim__lr_batch_size": 64, "optim__betas": [0.8, 0.99]}
    params = {"lr": 4e-3, "betas": [0.8, 0.99], "eps": 1e-8, "weight_decay": 0.01}
    assert "optimizer" not in settings_of(tmp_path, {"optimizer": {"type": "AdamW", "params": params}}, **chosen)
    for params, words in (
        ({"lr": 1e-3}, r"lr = 0\.001 there, but 0\.004 by optim\.lr x train\.batch_size / optim\.lr_batch_size"),
        ({"betas": [0.9, 0.999]}, r"betas = \[0\.9, 0\.999\] there, but \[0\.8, 0\.99\] by optim\.betas"),
        ({"momentum": 0.9}, r"momentum is not passed on"),
    ):
        with pytest.raises(AutodoError, match=words):
            settings_of(tmp_path, {"optimizer": {"params": params}}, **chosen)


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ({"train_batch_size": 128}, "train_batch_size = 128 there, but 256 by train.batch_size"),
        ({"train_micro_batch_size_per_gpu": 32}, "= 32 there, but 64 by train.batch_size over 4 ranks"),
        ({"gradient_accumulation_steps": 2}, "= 2 there, but 1 by train.accumulate"),
        ({"gradient_clipping": 1.0}, "= 1.0 there, but 0.0 by optim.clip_norm"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3 there, but 2 by engine.stage"),
        ({"fp16": {"enabled": True}}, "fp16.enabled = true there, but false by train.precision"),
        ({"bf16": {"enabled": 1}}, "bf16.enabled = 1 there, but false by train.precision"),
        ({"optimizer": {"type": "AdamW"}}, 'optimizer.type = "AdamW" there, but "sgd" by optim.name'),
        ({"optimizer": {"params": {"lr": 0.2}}}, "optimizer.params.lr = 0.2 there, but 0.1 by optim.lr"),
        ({"optimizer": {"params": {"betas": [0.9, 0.99]}}}, "optimizer.params.betas is not passed on"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type is not passed on"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer.device is not passed on"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients is not passed on"),
        ({"zero_optimisation": {"stage": 2}}, "zero_optimisation.stage is not passed on"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "'steps_per_print' is there twice"),
        ('{"a": ', "cannot be read as JSON"),
        ("[]", "holds no settings"),
    ],
    ids=str,
)
def test_a_clash_names_both_values_and_both_places(tmp_path: Path, file: Any, words: str) -> None:
    with pytest.raises(AutodoError) as caught:
        settings_of(tmp_path, file)
    assert words in str(caught.value)
    assert str(tmp_path / "ds.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def engine_config(**changes: Any) -> Config:
    tree: dict[str, Any] = {"data": {"root": "/nowhere"}, "engine": {"name": "deepspeed"}, "hyper": {"start_epoch": 0}}
    for name, value in changes.items():
        section, key = name.split("__")
        tree[section] = tree.get(section, {}) | {key: value}
    return check_config(tree, "test")


EXACT = {"engine__stage": 3, "learn__augment": "per_sample", "hyper__way": "shared"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"engine__stage": 4}, "engine.stage = 4"),
        ({"engine__name": "ddp", "engine__stage": 3}, "changes nothing with DDP; set engine.name=deepspeed too"),
        ({"engine__name": "ddp", "engine__deepspeed_config": "x.json"}, "engine.deepspeed_config = x.json: changes"),
        ({"engine__name": "deepspeec"}, "did you mean deepspeed"),
        ({"train__precision": "fp64"}, "train.precision = fp64: DeepSpeed .* set engine.name=ddp"),
        (EXACT, "hyper.way = shared and neumann takes two; set engine.stage=2, or hyper.way=separate"),
        # A batch too large to gather turns fisher into cg.
        (EXACT | {"hyper__solver": "fisher", "hyper__most_gathered": 10}, "and cg takes two"),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_the_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(AutodoError, match=words.replace(".", r"\.").replace(r" \.* ", " .* ")):
        engine_config(**changes)


def test_what_it_can_do_is_not() -> None:
    for allowed in ({"hyper__solver": "fisher"}, {"learn__augment": "none"}, {"hyper__way": "separate"}):
        assert engine_config(**(EXACT | {"learn__weight": True} | allowed)).engine.stage == 3


def test_engine_and_stage_are_free_at_a_resume() -> None:
    ddp = engine_config(engine__name="ddp")
    assert not differences(ddp, engine_config(engine__stage=3, engine__deepspeed_config="x.json"))
    assert differences(ddp, engine_config(engine__name="ddp", optim__clip_norm=1.0)) == ["optim.clip_norm: None -> 1.0"]


def test_refused_before_data_is_touched(digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is not installed, and a file that clashes: nothing is read, nothing written."""
    monkeypatch.setattr(build_data, "read_manifest", lambda *_: pytest.fail("data was read"))
    tree = with_stage(small(digits, tmp_path / "runs"), 2, {"gradient_clipping": 3.0})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(AutodoError, match=r"gradient_clipping = 3\.0 there, but 0\.0 by optim\.clip_norm"):
        run_train(tree)
    monkeypatch.setattr(deepspeed_settings.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        AutodoError, match=r"DeepSpeed is not installed; `pip install deepspeed`.* set engine\.name=ddp"
    ):
        run_train(with_stage(tree, 1))
    assert sorted(tmp_path.rglob("*")) == before


@needs_deepspeed
def test_what_deepspeed_does_not_take_is_one_line(pool: RankPool, digits: Path, tmp_path: Path) -> None:
    tree = with_stage(small(digits, tmp_path), 2, {"prescale_gradients": True})
    with pytest.raises(RankError, match=r"AutodoError: engine\.name = deepspeed: it does not start \(.*pre-sc"):
        pool.run(2, fresh, run_train, tree)
