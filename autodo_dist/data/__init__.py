"""The stream: webdataset shards on disk -> batches of pictures, labels and ids."""
