import re
from pathlib import Path

import pytest

from lmc_curvature.errors import ConfigurationError
from lmc_curvature.forking import ForkConfig, TrainingConfig, load_config
from lmc_curvature.sources import make_model

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
TEXT = "training: {epochs: 5, learning_rate: 0.1}\nfork_epochs: [0, 2]\n"


@pytest.fixture
def file(tmp_path):
    def write(text):
        (tmp_path / "config.yaml").write_text(text)
        return tmp_path / "config.yaml"

    return write


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_of_the_project_is_right(path):
    config = load_config(path)
    make_model(config.model, **config.model_options)
    # Every snapshot is of some child.
    assert max(config.snapshot_epochs) < config.training.epochs
    assert load_config(path, data="elsewhere").data == "elsewhere"


def test_the_paper_is_there():
    paper = load_config(CONFIGS[0].parent / "cifar10-resnet20.yaml")
    training = paper.training
    assert (training.epochs, training.learning_rate, training.milestones) == (160, 0.1, (80, 120))
    assert (training.momentum, training.weight_decay, training.batch_size) == (0.9, 1e-4, 128)
    assert paper.fork_epochs == (0, 1, 2, 4, 6, 8, 14, 15, 20)
    bare = load_config(CONFIGS[0].parent / "cifar10-resnet18-no-norm.yaml")
    assert (bare.training.learning_rate, bare.training.batch_size) == (0.05, 64)


def test_epochs_of_snapshots_are_a_list_or_a_step(file):
    assert load_config(file(TEXT + "snapshot_epochs: 2\n")).snapshot_epochs == (2, 4)
    config = load_config(file(TEXT + "snapshot_epochs: [1, 3]\n"))
    assert config.snapshot_epochs == (1, 3)
    assert (config.child_epochs(0), config.child_epochs(2)) == ((1, 3, 5), (3, 5))
    # Snapshots at the fork itself would be the parent twice.
    assert ForkConfig(**{**config.model_dump(), "fork_epochs": [3]}).child_epochs(3) == (5,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: [", "is not YAML: while parsing a flow node expected the node content"),
        ("[" * 100_000, "is not YAML: "),
        ("a: &x [1]\nb: *x\n", r"has the alias \*x: write out what it is"),
        ("a: &x [*x]\n", r"has the alias \*x"),
        (TEXT + "self: 1\n", "self: unknown key"),
        (TEXT + "data: 2001-99-99\n", "is not YAML: month must be in 1..12"),
        (TEXT + "data: !!timestamp x\n", "is not YAML: "),
        (TEXT + "data: !!bool x\n", "is not YAML: 'x'"),
        (TEXT + "limit: " + "9" * 5000 + "\n", "is not YAML: "),
        (TEXT + "data: !!python/object/apply:os.system [echo]\n", "is not YAML: could not determine a constructor"),
        (
            TEXT.replace("epochs: 5", "epochs: 1000000000000") + "snapshot_epochs: 1\n",
            "training.epochs: .*less than or eq",
        ),
        ("- 1\n", "holds list; expected keys such as training"),
        ("", "holds NoneType; expected keys"),
        (TEXT + "1: 2\n", "1 is not a name"),
        (TEXT + "trace: {null: 2}\n", "None is not a name"),
        (TEXT + "limit: 3\nlimit: 4\n", "the key 'limit' is in line 3 and in line 4; expected each key once"),
        (TEXT + "trace:\n  alphas: 3\n  test: true\n  alphas: 3\n", "the key 'alphas' is in line 4 and in line 6"),
        (TEXT + "model_options: {a: [{b: 1, c: 2, b: 1}]}\n", "the key 'b' is in line 3 and in line 3"),
        (TEXT.replace("0.1", "true"), r"training\.learning_rate: expected a number, got true\."),
        (TEXT.replace("epochs: 5", "epochs: on"), r"training\.epochs: expected a number, got true\."),
        (TEXT.replace("[0, 2]", "[no, 2]"), r"fork_epochs\.0: expected a number, got false\."),
        (TEXT + "limit: yes\n", r"limit: expected a number, got true\."),
        (TEXT + "trace: {examples: true}\n", r"trace\.examples: expected a number, got true\."),
        (TEXT + "snapshot_epochs: true\n", r"snapshot_epochs: "),
        (TEXT + "modle: resnet20\n", "modle: unknown key; did you mean 'model'"),
        (TEXT.replace("epochs: 5", "epochs: five"), "training.epochs: .*got 'five'"),
        (TEXT + "trace: {examples: 0}\n", "trace.examples: .*greater than or equal to 1, got 0"),
        (TEXT + "snapshot_epochs: 1.5\n", "snapshot_epochs: .*got 1.5"),
        (TEXT.replace("2]", "5]"), "fork_epochs: 5 is outside the schedule of 5 epochs; choose from 0 to 4"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(file, text, message):
    with pytest.raises(ConfigurationError, match=r"config\.yaml(?s:.)*" + message):
        load_config(file(text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"none\.yaml cannot be read \(No such file"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fork_epochs": [0, 3]}, "fork_epochs: 3 is outside the schedule of 3 epochs; choose from 0 to 2"),
        ({"fork_epochs": [-1]}, "fork_epochs: -1 is outside"),
        ({"fork_epochs": [2, 1]}, r"fork_epochs: \(2, 1\) must increase"),
        ({"fork_epochs": []}, "fork_epochs: "),
        ({"snapshot_epochs": 0}, "snapshot_epochs: 0: expected a list of epochs, or at least 1"),
        ({"snapshot_epochs": [3]}, "snapshot_epochs: 3 is outside the schedule of 3 epochs; choose from 1 to 2"),
        ({"trace": {"alpha": 3}}, "trace.alpha: unknown key; did you mean 'alphas'"),
        ({"trace": {"layers": "some"}}, "trace.layers: .*'all', 'last' or 'never'"),
        ({"children": 1}, "children: .*greater than or equal to 2, got 1"),
        ({"fork_epoch": [0]}, "fork_epoch: unknown key; did you mean 'fork_epochs'"),
        ({"training": {"epochs": 3, "learning_rat": 1}}, "training.learning_rate: missing"),
        ({"training": {"epochs": 3, "learning_rate": -1}}, "training.learning_rate: .*greater than 0, got -1"),
        (
            {"training": {"epochs": 3, "learning_rate": 1, "epoch": 2}},
            "training.epoch: unknown key; did you mean 'epochs'",
        ),
        ({"training": 3}, "training: .*got 3"),
    ],
)
def test_bad_configurations_name_the_key(settings, change, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        ForkConfig(**{**settings, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, "learning_rat: unknown key; did you mean 'learning_rate'?"),
        ({"learning_rate": 0}, "learning_rate: Input should be greater than 0, got 0."),
        ({"learning_rate": "fast"}, "learning_rate: Input should be a valid number.*, got 'fast'."),
        ({"learning_rate": float("nan")}, "learning_rate: Input should be "),
        ({"momentum": 1.0}, "momentum: Input should be less than 1"),
        ({"milestones": (3, 2)}, re.escape("milestones: (3, 2) must increase.")),
        ({"milestones": (10,)}, "milestones: 10 is outside the schedule of 10 epochs; choose from 1 to 9."),
    ],
)
def test_bad_schedules_name_the_key(change, message):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        TrainingConfig(**{"epochs": 10, "learning_rate": 0.1, **change})


def test_every_problem_has_a_line():
    with pytest.raises(ConfigurationError) as caught:
        TrainingConfig(batch_size=0)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["epochs", "learning_rate", "batch_size"]
