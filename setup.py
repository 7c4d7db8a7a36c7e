"""Package metadata. Tool settings live in pyproject.toml."""

import re
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "megatron_mergemix" / "__init__.py").read_text(), re.M
)[1]

# Megatron Core 0.17 and later need Python 3.12; 0.16.1 is the newest one for 3.10 and 3.11.
MEGATRON_CORE = [
    'megatron-core>=0.16.1,<0.17; python_version < "3.12"',
    'megatron-core>=0.19,<0.20; python_version >= "3.12"',
]

OPTIONAL = {
    "lightgbm": ["lightgbm"],
    "optuna": ["optuna>=4"],
    "lm-eval": ["lm-eval>=0.4.13,<0.5"],
    "report": ["matplotlib"],
    "nltk": ["nltk"],
    "huggingface": ["transformers"],
}

# Plain C without Python's headers. Where it cannot be compiled, torch does its work.
KERNEL = Extension(
    "megatron_mergemix.merge._kernel",
    sources=["megatron_mergemix/merge/kernel.c"],
    extra_compile_args=["-std=gnu11", "-O3", "-ffp-contract=fast", "-Wno-psabi"],
    libraries=["m"],
    optional=True,
)

setup(
    name="megatron-mergemix",
    version=VERSION,
    description="Learn the data mixture of a Megatron-LM run by merging domain experts.",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megatron_mergemix*"]),
    package_data={"megatron_mergemix": ["py.typed", "report/page.css", "report/page.js"]},
    ext_modules=[KERNEL],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        *MEGATRON_CORE,
        "numpy",
        "scipy",
        "pydantic>=2",
        "PyYAML",
        "psutil",  # without it Megatron's checkpoint writer hangs
        "tensorboard",
        "rich",
        "isal",  # CRC-32 as fast as memory; zlib's takes longer than the rest of a merge
    ],
    extras_require={
        **OPTIONAL,
        "dev": [
            *(package for packages in OPTIONAL.values() for package in packages),
            *("pytest", "pytest-timeout", "pytest-xdist", "hypothesis"),
            *("ruff", "mypy", "types-PyYAML"),
            *("scikit-learn", "cmaes"),  # peers in benchmarks
            "accelerate",  # lm-eval's Hugging Face backend, which its scores are compared with
            # What a Megatron-LM checkout imports beyond Megatron Core.
            *("six", "pybind11", "triton; platform_system == 'Linux'"),
        ],
    },
    entry_points={"console_scripts": ["mergemix = megatron_mergemix.cli:main"]},
)
