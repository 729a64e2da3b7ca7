"""The clients of Google Cloud Storage, Azure and the hub, as fsspec file systems that say when a bucket is not there.

Each module imports its client, which comes with an extra, and is imported itself only by `featurestore.file_systems`.
S3 needs none: s3fs keeps the server's reply as the cause of its errors.

May use: errors and credentials.
"""
