"""Installs lcl: `pip install -e .` (add `[dev]` for the tests, `[tpu]` on a TPU VM).

The lower bounds are what the code needs; launch/constraints-*.txt are the exact sets it is
tested with.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lcl/__init__.py").read_text()).group(1)
README = ROOT / "README.md"

setuptools.setup(
    name="lcl",
    version=VERSION,
    description="Long-context continual learning of language models, in JAX, for TPUs",
    long_description=README.read_text() if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_namespace_packages(include=["lcl", "lcl.*"]),
    package_data={"lcl": ["**/*.md"]},
    install_requires=[
        "array_record>=0.6.0",
        "flax>=0.12.0",
        "gin-config>=0.5.0",
        "grain>=0.2.12",
        "jax>=0.8.0",
        "matplotlib>=3.8",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pyarrow>=17",  # parquet and zstd; TFDS brings it anyway
        "sentencepiece>=0.2.0",
        # seqio brings tensorflow-text and through it the one tensorflow; asking for tensorflow-cpu
        # too would install a second copy over the first.
        "seqio>=0.0.20",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
        "tqdm>=4.66",
    ],
    extras_require={
        # On a TPU VM; and for `lcl compile` on any Linux x86-64 machine, where libtpu needs no TPU.
        "tpu": ["jax[tpu]>=0.8.0"],
        # Other people's checkpoints and models, to read, write and compare with.
        "hf": ["safetensors>=0.4.5", "transformers>=4.56", "torch>=2.6"],
        "evals": [],
        # Near-duplicate removal by MinHash. Its signatures change with its minor version.
        "dedup": ["rensa>=0.5,<0.6"],
        # Nearest neighbours of more than some 200,000 documents on a CPU.
        "faiss": ["faiss-cpu>=1.8"],
        # Weights & Biases, for Logging.trackers.
        "wandb": ["wandb>=0.18"],
        # Any sentence encoder for in-context orders (torch comes with it).
        "sentence": ["sentence-transformers>=3.0"],
        "dev": [
            "faiss-cpu>=1.8",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "jax[tpu]>=0.8.0; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "mypy>=1.15",
            "nbclient>=0.10",
            "nbformat>=5.10",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "rensa>=0.5,<0.6",
            "ruff>=0.9",
            "safetensors>=0.4.5",
            "torch>=2.6",
            "transformers>=4.56",
            "types-tqdm",
        ],
    },
    entry_points={"console_scripts": ["lcl = lcl.main:run"]},
)
