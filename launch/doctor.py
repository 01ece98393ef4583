"""Can this machine run sparse-llama, correctly?  python launch/doctor.py --report doctor.txt

deepspeed launch/doctor.py      # the same on every rank of a job
"""

from sparse_llama import cli

if __name__ == "__main__":
    cli.main(cli.doctor, cli.doctor_parser(__doc__))
