"""The archive for hosts without a package registry: pinned, and nothing that what it holds imports is missing."""

import re
import subprocess
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "deploy" / "offline_bundle.sh"
EXTRAS = {"ray": {"", "serve"}}  # of which we need one


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def listed(variable: str) -> set[str]:
    found = re.search(rf'^{variable}="([^"]+)"', SCRIPT.read_text(), re.MULTILINE)
    assert found is not None
    return {canonical(name) for name in found[1].split()}


def needed(name: str) -> set[str]:
    """What the installed version of a package asks for on a Linux host, Python 3.12."""
    names = set()
    for text in requires(name) or []:
        requirement = Requirement(text)
        for extra in EXTRAS.get(name, {""}):
            here = {"extra": extra, "python_version": "3.12", "python_full_version": "3.12.3"}
            if requirement.marker is None or requirement.marker.evaluate(here):
                names.add(canonical(requirement.name))
    return names


def test_it_is_shell_and_every_package_is_pinned():
    assert subprocess.run(["bash", "-n", str(SCRIPT)], capture_output=True).returncode == 0
    pinned = {canonical(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert listed("PACKAGES") <= pinned


def test_whatever_a_package_of_it_needs_is_in_it_or_on_the_host():
    bundled, host, unused = listed("PACKAGES"), listed("HOST"), listed("UNUSED")
    for name in sorted(bundled):
        assert needed(name) <= bundled | host | unused, name
    assert not bundled & (host | unused)


def test_what_expertmesh_itself_needs_is_there():
    assert needed("expertmesh") <= listed("PACKAGES") | listed("HOST")


def test_nothing_of_ours_imports_what_was_left_out():
    left_out = {"virtualenv", "py_spy", "smart_open", "dotenv", "websockets", "ray.data", "ray.train", "ray.tune"}
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or "tests" in path.parts or ".gpu" in path.parts or ".link" in path.parts:
            continue
        for module in re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert not any(module == name or module.startswith(name + ".") for name in left_out), (path, module)
