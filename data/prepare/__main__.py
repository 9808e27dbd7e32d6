from data.prepare.cli import main
from s2 import ending

if __name__ == "__main__":
    ending.run(main)
