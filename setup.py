"""Package of megads. PyTorch comes first (see README): a looser request would pull a CUDA build onto a laptop."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = next(
    line.split('"')[1] for line in Path("megads/__init__.py").read_text().splitlines() if "__version__" in line
)

setup(
    name="megads",
    version=VERSION,
    description="A Megatron-style trainer for large language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["megads", "megads.*"]),
    package_data={"megads": ["py.typed"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "numpy>=1.26",
        "pydantic>=2.7",
        "ruamel.yaml>=0.18",
        "rich>=13",
        "blake3>=1.0",
        "tokenizers>=0.20",
        "sentencepiece>=0.2",
        "pyarrow>=15",
    ],
    extras_require={"dev": ["pytest>=8", "pytest-timeout>=2.3", "hypothesis>=6", "ruff>=0.8", "mypy>=1.11"]},
)
