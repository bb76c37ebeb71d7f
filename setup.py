"""What pyproject.toml cannot say: the page and the programs lie at the top of the repository, and are installed inside
the package, so that nothing generic (`app`, `train_scripts`) lands in site-packages.

    app/            ->  reslora_diffusion/app/
    train_scripts/  ->  reslora_diffusion/train_scripts/
"""

from setuptools import find_packages, setup

INSIDE = {"app": "reslora_diffusion.app", "train_scripts": "reslora_diffusion.train_scripts"}
MODULES = find_packages(include=["reslora_diffusion", "reslora_diffusion.*"])
PAGE = [f"reslora_diffusion.{name}" for name in find_packages(include=["app", "app.*"])]
CONFIGS = ["reslora_diffusion.train_scripts.configs", "reslora_diffusion.train_scripts.configs.accelerate"]

setup(
    packages=[*MODULES, *PAGE, INSIDE["train_scripts"], *CONFIGS],
    package_dir={inside: folder for folder, inside in INSIDE.items()},
    package_data={
        "": ["*.pyi"],
        "reslora_diffusion": ["py.typed"],
        "reslora_diffusion.app": ["static/*"],
        "reslora_diffusion.train_scripts.configs": ["*.yaml"],
        "reslora_diffusion.train_scripts.configs.accelerate": ["*.json", "*.yaml"],
    },
)
