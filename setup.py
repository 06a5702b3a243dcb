"""Package metadata. Pinned versions that are tested together stand in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

# What SAT 0.4.12 imports and does not declare: a fresh environment cannot import it without these.
SAT_UNDECLARED = [
    "requests",
    "tensorboardX",
    "triton; platform_system == 'Linux'",
    "wandb",
]

setup(
    name="sat_ext",
    version="0.1.0",
    description="Train video diffusion models on images and videos together, on the SAT backend of CogVideoX",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["sat_ext", "sat_ext.*"]),
    package_data={"sat_ext.preview": ["page.html.j2", "page.css"], "sat_ext.report": ["run.html.j2"]},
    install_requires=[
        "torch>=2.4",
        "SwissArmyTransformer>=0.4.12",
        "deepspeed>=0.16",
        "diffusers>=0.35",
        "transformers>=4.56",
        "peft>=0.17",
        "omegaconf>=2.3",
        "webdataset>=0.2.86",
        "av>=14",
        "braceexpand",
        "decord>=0.6.0; platform_machine == 'x86_64'",
        "fsspec>=2026.7",
        "jinja2",
        "numpy",
        "Pillow>=11.3",
        "pyarrow>=14",
        "PyYAML",
        "safetensors",
        "sentencepiece",
        "simplejpeg",
        "tensorboard",
        "rich",
        "tqdm",
        "typer>=0.15",
        *SAT_UNDECLARED,
    ],
    extras_require={
        "bitsandbytes": ["bitsandbytes>=0.46"],  # 8-bit optimizers, bases and encoders in NF4
        "heif": ["pillow-heif"],  # HEIC and HEIF stills
        "motion": ["opencv-python-headless"],  # model.sampling.motion
        "http": ["aiohttp"],  # sources behind http(s)://
        "s3": ["s3fs>=2026.7"],  # sources behind s3://
        "scenes": ["scenedetect-headless>=0.7"],  # sat-ext scenes
        "test": [
            "aiohttp",
            "bitsandbytes>=0.46",
            "hypothesis",
            "moto[server]",
            "mypy",
            "opencv-python-headless",
            "pillow-heif",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "s3fs>=2026.7",
            "scenedetect-headless>=0.7",
            "scikit-image",
            "scikit-video",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["sat-ext = sat_ext.cli.main:main"]},
)
