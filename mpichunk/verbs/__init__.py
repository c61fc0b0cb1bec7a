"""One module per verb of the command line; `onranks` has what those on many ranks share."""
