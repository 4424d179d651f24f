"""A wheel: built from the tree, and used in another folder."""

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

from jflow.interop import remote

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> pathlib.Path:
  """A folder that holds the unpacked wheel."""
  pytest.importorskip("setuptools")
  made = tmp_path_factory.mktemp("wheel")
  files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
  for name in files:
    if name.startswith(("jflow/", "configs/")) or "/" not in name:
      (made / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
      (made / "tree" / name).symlink_to(ROOT / name)
  (made / "tree" / "jflow" / "configs").unlink()
  (made / "tree" / "jflow" / "configs").symlink_to("../configs")
  build = "import os, setuptools.build_meta as b; print(b.build_wheel('..'))"
  done = subprocess.run([sys.executable, "-c", build], cwd=made / "tree", capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  zipfile.ZipFile(next(made.glob("*.whl"))).extractall(made / "site")
  return made / "site"


@pytest.mark.process
@pytest.mark.parametrize(
  "named", ["stage2:tiny", "janus/stage2:tiny", "configs/stage2.py:tiny", "ablation:F-tiny", "mine.py:tiny"]
)
def test_the_configs_come_along_and_have_names_anywhere(installed, tmp_path, named):
  """Each run ends at a workdir that cannot be, after it has read the config and its tokenizer."""
  (tmp_path / "mine.py").write_text("from configs import stage2\nget_config = stage2.get_config\n")
  environment = os.environ | {"PYTHONPATH": str(installed), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, "-P", "-m", "jflow", "train", f"--config={named}", "--workdir=/dev/null/run"]
  done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert done.stderr == "jflow: workdir /dev/null/run cannot be written: Not a directory\n" and done.returncode == 2


def test_a_wheel_holds_every_module_and_config(installed):
  files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
  wanted = {name for name in files if name.startswith("jflow/") and name.endswith(".py")}
  wanted |= {f"jflow/{name}" for name in files if name.startswith("configs/") and not name.endswith(".md")}
  models = tuple(f"{folder.relative_to(ROOT)}/" for folder in remote.SHIPPED.values())
  wanted |= {name for name in files if name.startswith(models)} | {f"{model}model.safetensors" for model in models}
  assert not {name for name in wanted if not (installed / name).is_file()}
