"""What can be told of a file that is damaged or somebody else's, nothing of it executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path

import torch

from holdfast.manage.showing import zip_look
from holdfast.manage.showing.zip_look import look_into, salvage
from tests.manage.runs import cut, flip, make_run


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch exploded",)


def test_a_file_of_torch_is_known_by_its_records_and_what_its_pickle_names(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": torch.nn.Linear(3, 4).state_dict(), "more": Bomb()}, path)
    found = look_into(path)
    assert found.form == zip_look.TORCH
    assert {record.name.partition("/")[2]: record.size for record in found.records}["data/0"] == 48
    assert "collections.OrderedDict" in found.imports and "posix.system" in found.imports
    assert not Path("exploded").exists()


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert look_into(path).form == zip_look.PICKLE
    path.write_bytes(pickle.dumps([1], protocol=4))
    assert look_into(path).form == zip_look.PICKLE
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert (look_into(path).form, len(look_into(path).records)) == (zip_look.ZIP, 1)
    for data, form in ((b"", zip_look.EMPTY), (b"hello", zip_look.UNKNOWN), (b"P", "unknown")):
        path.write_bytes(data)
        assert look_into(path).form == form


def test_a_pickle_of_nonsense_or_a_bomb_of_zeros_is_looked_at_in_peace(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for data, how in (
        (b"\x80\x02c\nbroken", zipfile.ZIP_STORED),
        (b"\x93" * 9, zipfile.ZIP_STORED),
        (b"0" * 10**7, zipfile.ZIP_DEFLATED),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", data, how)
        assert look_into(path).form == zip_look.TORCH and len(look_into(path).imports) < 2


def test_an_encrypted_one_is_not_looked_into(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps([1]))
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(signature) + flags] |= 1
    path.write_bytes(data)
    assert look_into(path).form == zip_look.TORCH and not look_into(path).imports


def test_the_records_in_front_of_a_cut_are_found_and_checked(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", (1.0,)) / "model_epoch_1.pt"
    every = salvage(path)
    assert every[-1].name.endswith("holdfast.json") and all(record.whole for record in every)
    flip(path, every and 4096)
    assert [record.whole for record in salvage(path)].count(False) == 1
    cut(path)
    found = salvage(path)
    assert 0 < len(found) < len(every) and found[-1].whole is False
    assert [record.name for record in found] == [record.name for record in every[: len(found)]]
    path.chmod(0o644)
    path.write_bytes(b"\0" * 100)
    assert salvage(path) == []
