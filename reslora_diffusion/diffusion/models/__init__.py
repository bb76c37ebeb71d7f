"""The models of a run: loaded, adapted, and made to take less memory; one file for each family in `families`."""
