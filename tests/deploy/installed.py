"""This checkout as an installation in /opt of a machine, whatever directory and interpreter it is developed with.

Units cannot see home directories, where checkouts and interpreters often are: they are shown below /opt instead.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.deploy.manifests import ROOT

PREFIX = "opt/tensor-parallel"
PROGRAMS = {"shardd": "shardd.main", "coordinator": "coordinator.main", "shardctl": "coordinator.cli"}


def bindings() -> dict[Path, str]:
    return {
        Path(sys.base_prefix): "/opt/python",
        Path(sysconfig.get_path("purelib")): "/opt/packages",
        ROOT: "/opt/source",
    }


# An interpreter that was moved looks for its own library where it was.
ENVIRONMENT = {"LD_LIBRARY_PATH": "/opt/python/lib"}


def environment(root: Path) -> None:
    """The package and its programs in /opt/tensor-parallel, given ``bindings``."""
    prefix = root / PREFIX
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = prefix / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    (packages / "here.pth").write_text("/opt/source\n/opt/packages\n", encoding="utf-8")
    (prefix / "pyvenv.cfg").write_text("home = /opt/python/bin\n", encoding="utf-8")
    (prefix / "bin").mkdir()
    (prefix / "bin" / "python3").symlink_to(f"/opt/python/bin/{version}")
    for name, module in PROGRAMS.items():
        script = prefix / "bin" / name
        script.write_text(f"#!/{PREFIX}/bin/python3\nimport sys\nfrom {module} import main\nsys.exit(main())\n")
        script.chmod(0o755)


def install(root: Path, *options: str) -> None:
    """The package's environment, and the units by their own script."""
    environment(root)
    command = [str(ROOT / "deploy/systemd/install.sh"), "--root", str(root), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    with (root / "etc/tensor-parallel/tensor-parallel.env").open("a", encoding="utf-8") as settings:
        settings.writelines(f"{name}={value}\n" for name, value in ENVIRONMENT.items())
