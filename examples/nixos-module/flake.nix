{
  description = "A machine of one's own with the services of RAVE";

  # what `ravectl render --engine nix DIR` wrote, in a repository of yours
  inputs.rave.url = "git+ssh://git@example.org/team/rave-flake";
  inputs.nixpkgs.follows = "rave/nixpkgs";

  outputs =
    { nixpkgs, rave, ... }:
    {
      nixosConfigurations.workbench = nixpkgs.lib.nixosSystem {
        modules = [
          rave.nixosModules.rave-safe
          ./configuration.nix
          { nixpkgs.hostPlatform = "x86_64-linux"; }
        ];
      };
    };
}
