"""From files to batches of token rows, whatever their size.

    files -> documents -> train | held-out -> token ids -> rows -> batches

    prepare     the way from files to token ids on disk, and what is kept
    |-- read      files and folders to documents
    |   |-- formats   text, JSONL, JSON, tables, notebooks, HTML, compressed
    |   |-- records   Parquet and ArrayRecord, by their libraries
    |   `-- remote    gs://, s3:// and the like, by fsspec
    |-- texts     the text of all documents, read a block at a time
    |-- split     which documents are held out
    |   `-- copies    what stands on both sides, by content
    |       `-- windows   every stretch of 50 characters, hashed
    |-- encode    text to token ids, on all cores
    `-- cache     what is kept between runs, and how it survives damage
    rows        token ids packed into rows, made when they are asked for
    batches     rows to batches; the batch is a function of seed and step
    mixture     the same of several texts, each with its share of a step

For text that fits into memory the same steps are functions of the public API:
`read_corpus`, `split_documents`, `tokenize`, `pack`, `training_batches`.
"""
