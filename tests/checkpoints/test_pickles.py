"""Claim: a pickle with code is called what it is, however it was written, and its code never runs."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zlib

import numpy as np
import pytest
import torch
from torch import nn

from lmc_curvature.checkpoints import load_checkpoint
from lmc_curvature.checkpoints.pickles import code_in
from lmc_curvature.errors import CheckpointError

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)


class Calls:
    def __reduce__(self):
        return os.system, ("echo the checkpoint ran code",)


class Layer(nn.Linear):
    """A network that only this file knows."""


def pickled(contents, protocol=2):
    return pickle.dumps(contents, protocol=protocol)


def in_a_tar(contents):
    """As torch wrote before version 0.2."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, part in {"sys_info": {}, "storages": [], "pickle": contents}.items():
            member = tarfile.TarInfo(name)
            member.size = len(pickled(part))
            tar.addfile(member, io.BytesIO(pickled(part)))
    return archive.getvalue()


def with_arrays_between(contents):
    """As joblib writes: the numbers of an array follow what names it, and are no pickle."""
    return pickled([contents, 0], 4)[:-1] + np.arange(100.0).tobytes()


def saved(contents, **options):
    stream = io.BytesIO()
    torch.save(contents, stream, **options)
    return stream.getvalue()


FORMS = {
    **{f"pickle, protocol {protocol}": lambda contents, p=protocol: pickled(contents, p) for protocol in PROTOCOLS},
    **{f"torch.save, protocol {p}": lambda contents, p=p: saved(contents, pickle_protocol=p) for p in (2, 4, 5)},
    "torch.save before 1.6": lambda contents: saved(contents, _use_new_zipfile_serialization=False),
    "tar": in_a_tar,
    "joblib": with_arrays_between,
    "gzip": lambda contents: gzip.compress(pickled(contents, 4)),
    "bz2": lambda contents: bz2.compress(pickled(contents)),
    "xz": lambda contents: lzma.compress(pickled(contents, 3)),
    "zlib": lambda contents: zlib.compress(pickled(contents, 4)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("contents", ["a call", "a call inside", "a network"])
def test_code_is_named_and_does_not_run(form, contents, tmp_path, capfd):
    things = {"a call": Calls(), "a call inside": {"state_dict": {"weight": [1.0, Calls()]}}, "a network": Layer(2, 2)}
    path = tmp_path / "a.pt"
    path.write_bytes(FORMS[form](things[contents]))
    name = rf"{__name__}\.Layer" if contents == "a network" else rf"{os.name}\.system"
    with pytest.raises(
        CheckpointError, match=rf"a\.pt is refused: it holds more than tensors, .*\({name}\)\. Save the"
    ):
        load_checkpoint(nn.Linear(2, 2), path)
    assert "ran code" not in capfd.readouterr().out


def test_state_dicts_by_plain_pickle_are_told_from_damage(tmp_path):
    for protocol in PROTOCOLS:
        (tmp_path / "a.pkl").write_bytes(pickled(nn.Linear(2, 2).state_dict(), protocol))
        with pytest.raises(CheckpointError, match=r"a\.pkl is refused: .*torch\.storage\._load_from_bytes"):
            load_checkpoint(nn.Linear(2, 2), tmp_path / "a.pkl")


def test_torchscript_is_code(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"is refused: .*__torch__.*Linear"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "a.pt")


def test_tensors_and_plain_values_are_no_code(tmp_path):
    path = tmp_path / "a"
    contents = {"state_dict": nn.Linear(2, 2).state_dict(), "lr": 0.1, "names": ["a", ("b",)], "flag": None}
    for protocol in (2, 3, 4, 5):
        torch.save(contents, path, pickle_protocol=protocol)
        assert code_in(path) is None
    for protocol in PROTOCOLS:
        path.write_bytes(pickled({"a": 1, "b": [2.0, "c"]}, protocol))
        assert code_in(path) is None
    for nothing in (b"", b"\x80", b"x", b"\x1f\x8b", b"cos\n", bytes(range(256)) * 9):
        path.write_bytes(nothing)
        assert code_in(path) is None
