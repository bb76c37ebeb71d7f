"""DreamBooth training of diffusion models. Import the modules by name: some of them must come up without torch."""
