"""The subcommands of `autodo`: each reads its options, calls the library and prints."""
