from mixflow.cli import main

main()
