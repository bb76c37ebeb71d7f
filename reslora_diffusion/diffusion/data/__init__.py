"""The data of a run: folders and datasets scanned, images cropped and encoded, batches drawn."""
