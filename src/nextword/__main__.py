from nextword.cli import main

main()
