"""The notebooks are stored without outputs and run from top to bottom, shortened."""

import importlib.util
import re
import shutil
import tempfile
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="install the [test] extra")
nbclient = pytest.importorskip("nbclient", reason="install the [test] extra")
traitlets = pytest.importorskip("traitlets", reason="install the [test] extra")

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "colabs").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)

# What a cell must have printed, so that one that computes nothing is found out.
PRINTED = {
    "1_": ("equal: encoderblock_0/output", "our function is right on"),
    "2_": ("stand-in is trained", "begins with stand_in.npz (google)", "model.safetensors"),
    "3_": ("accuracy on the test images", "figures and report.html in figures"),
    "4_": ("on 8 cpu device(s)", "largest relative difference", "on one device: accuracy"),
}


def printed(notebook):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return "".join(out.text for out in outputs if out.output_type == "stream")


def pictures(notebook):
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    return sum("image/png" in out.get("data", {}) for out in outputs)


def test_there_are_four():
    assert [path.stem[:2] for path in NOTEBOOKS] == ["1_", "2_", "3_", "4_"]


@each
def test_stored_without_outputs_and_valid(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z-]+", cell.id), cell.id  # a name, for readable changes
        assert cell.metadata == {}, cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [], cell.id
            assert cell.execution_count is None, cell.id
    # As nbformat writes it, so that opening and saving one changes nothing.
    assert text == nbformat.writes(notebook, indent=1, ensure_ascii=False).rstrip("\n") + "\n"


@each
def test_links_lead_to_papers_and_documentation_only(path):
    hosts = set(re.findall(r"https?://([^/\s\"')]+)", path.read_text(encoding="utf-8")))
    assert hosts <= {"arxiv.org", "docs.jax.dev", "github.com"}
    links = re.findall(r"github\.com/[\w./-]+", path.read_text(encoding="utf-8"))
    assert set(links) == {"github.com/USER/vit_jax"}  # which the reader replaces


@pytest.mark.slow
@pytest.mark.timeout(300)
# The event loop that pytest closes nothing of, and sockets of the kernel's client.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter_client|nbclient|zmq)")
@each
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch, request):
    if importlib.util.find_spec("ipykernel") is None:
        pytest.skip("install the [test] extra")
    monkeypatch.setenv("VIT_JAX_FAST", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("XLA_FLAGS")  # one device; the fourth notebook asks for eight itself
    # Nobody listens there, so that nothing is fetched, also where there is a network.
    monkeypatch.setenv("VIT_JAX_GCS_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("VIT_JAX_CACHE", str(tmp_path / "cache"))
    for folder in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(folder, str(tmp_path / folder.lower()))
    # Files as sockets, for two kernels that start at once may choose the same TCP port; not
    # below tmp_path, as their names may be no longer than a hundred characters.
    sockets = tempfile.mkdtemp()
    request.addfinalizer(lambda: shutil.rmtree(sockets))
    options = traitlets.config.Config(
        {"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}}
    )
    notebook = nbformat.read(path, as_version=4)
    # transformers refuses to load where torchvision is broken, and works where it is missing.
    hide = "import sys; sys.modules['torchvision'] = None"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(hide))
    work = tmp_path / "work"
    work.mkdir()
    resources = {"metadata": {"path": str(work)}}
    client = nbclient.NotebookClient(notebook, timeout=240, resources=resources, config=options)
    client.execute()

    text = printed(notebook)
    for expected in PRINTED[path.stem[:2]]:
        assert expected in text
    if path.stem.startswith("2_") and importlib.util.find_spec("transformers"):
        assert re.search(r"both say [5-9] with the scores", text)
    assert "Traceback" not in text
    assert pictures(notebook) >= 2
    assert not [place for place in ROOT.iterdir() if place.name in ("photos", "figures")]
