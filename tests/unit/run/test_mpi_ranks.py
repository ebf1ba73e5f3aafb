"""What torch.distributed needs, from what an MPI launcher tells its ranks."""

from __future__ import annotations

from spotspeed.run import export_ranks, parse


def by_mpi(rank: int, size: int, local_size: int, job: str = "prterun-a-1@1") -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(size),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank % local_size), "PMIX_NAMESPACE": job,
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(local_size),
    }  # fmt: skip


def test_one_host_needs_nothing_and_its_jobs_have_ports_of_their_own() -> None:
    ports = {}
    for job in ("prterun-a-1@1", "prterun-a-2@1"):
        environments = [by_mpi(rank, 2, 2, job) for rank in range(2)]
        assert [export_ranks(environment) for environment in environments] == [None, None]
        for rank, environment in enumerate(environments):
            found = [environment[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
            assert found == [str(rank), str(rank), "2"]
            assert environment["MASTER_ADDR"] == "127.0.0.1"
        [ports[job]] = {environment["MASTER_PORT"] for environment in environments}
    assert len(set(ports.values())) == 2
    assert all(20000 <= int(port) < 32768 for port in ports.values())


def test_several_hosts_have_their_ranks_and_are_told_what_is_missing_once() -> None:
    environments = [by_mpi(rank, 4, 2) for rank in range(4)]
    said = [export_ranks(environment) for environment in environments]
    assert said[1:] == [None, None, None] and "MASTER_ADDR is not set" in str(said[0])
    assert [environment["RANK"] for environment in environments] == ["0", "1", "2", "3"]
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1", "0", "1"]
    assert all("MASTER_ADDR" not in environment for environment in environments)


def test_what_the_user_has_set_stays() -> None:
    environment = by_mpi(3, 4, 2) | {"MASTER_ADDR": "first", "MASTER_PORT": "1234"}
    assert export_ranks(environment) is None
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("first", "1234")
    other = by_mpi(3, 4, 2) | {"RANK": "0"}
    before = dict(other)
    assert export_ranks(other) is None and other == before
    assert export_ranks(nothing := {}) is None and nothing == {}


def test_without_a_name_of_the_job_the_port_is_the_usual_one() -> None:
    environment = {"PMI_RANK": "0", "PMI_SIZE": "2", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert export_ranks(environment) is None
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("127.0.0.1", "29500")


def test_the_local_rank_of_the_deepspeed_launcher_goes_where_scripts_expect_it() -> None:
    target = parse(["--local_rank=1", "train.py", "--steps", "3"])
    assert (target.name, target.arguments) == ("train.py", ("--local_rank=1", "--steps", "3"))
    assert parse(["--local-rank", "1", "-m", "pkg", "x"]).arguments == ("--local-rank=1", "x")
