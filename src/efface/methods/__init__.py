"""The methods of erasure, one file each: the file name is the registry, and no file imports another."""
