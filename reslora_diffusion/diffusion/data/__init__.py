"""The data of a run: folders and datasets scanned, images cropped and encoded, batches drawn.

scan, hub_dataset            the images of a folder, or of a dataset of the hub
concepts, wordings           what is trained on which images, and their captions
buckets                      the size that each image is trained at
crops                        an image is resized to its bucket, cropped and mirrored (`Views.of`)
encode                       latents and prompts are encoded once
disk_cache                   encodings that later runs reuse
class_images, examples       missing images of the class are generated; from a plan to encoded examples
sampling                     the examples of each step, a function of (seed, step)
prompts                      validation prompts
"""
