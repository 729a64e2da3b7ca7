"""Workers of a running scheduler read public buckets without credentials while the command is connected."""

import os

from distributed import LocalCluster

from featurestore.embedding.dask_clients import remote_client
from featurestore.file_systems import ENV_ANONYMOUS, ENV_SIGNED, anonymous_access


def test_the_workers_of_a_scheduler_get_the_setting_and_lose_it_again() -> None:
    with LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        dashboard_address=None,
        silence_logs=50,
        scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
    ) as cluster:
        address = cluster.scheduler_address
        with anonymous_access(signed=["s3://mine/store"]), remote_client(address) as client:
            settings = [os.environ[name] for name in (ENV_ANONYMOUS, ENV_SIGNED)]
            found = [
                client.submit(os.getenv, name, pure=False).result() for name in (ENV_ANONYMOUS, ENV_SIGNED)
            ]
            assert found == settings
        with remote_client(address) as client:
            assert client.submit(os.getenv, ENV_ANONYMOUS, pure=False).result() is None
